"""From training examples to merged weights: LoRA fine-tuning, merging, and comparing models."""
