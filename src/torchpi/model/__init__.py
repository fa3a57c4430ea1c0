"""The model in plain PyTorch: SigLIP, two Gemma stacks, suffix, flow matching. Imports only types and config."""
