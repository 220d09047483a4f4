"""Fine-tuning by distillation, and top-1."""
