"""The language model: config, decoder, Hugging Face in and out, tokenizer, sampler."""
