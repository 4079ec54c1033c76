"""What a multiple-choice question is: prompts, option orders, answers, verdicts. Pure functions."""
