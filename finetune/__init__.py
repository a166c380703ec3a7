"""finetune: a systems lab for LLM, VLM and RLHF training."""
