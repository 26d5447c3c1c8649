"""mpt_jax beside PEFT on PyTorch: the same T5, prompt, batches and optimiser on the same device, in turns. See README.md."""
