"""Models from and to files: folders in Hugging Face's names, safetensors, GGUF, the hub."""
