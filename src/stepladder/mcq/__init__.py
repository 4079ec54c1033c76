"""Multiple-choice questions: files and formats, prompts, option orders, answers, verdicts. Calls no models."""
