"""Text from the model: slots, prefill and decode, cached attention, sampling."""
