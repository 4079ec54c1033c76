"""From examples to weights: template, LoRA fine-tuning, merging, quantisation."""
