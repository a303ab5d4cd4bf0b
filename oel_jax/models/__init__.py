"""The language model: config, decoder, attention, weights in and out of Hugging Face files."""
