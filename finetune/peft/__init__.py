"""Parameter-efficient fine-tuning: LoRA, adapter folders, quantized weights, virtual tokens."""
