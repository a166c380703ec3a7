"""Language models: Llama and GPT-2, layers, generation, tokenizer, chat template."""
