"""The model in plain torch: SigLIP, Gemma twice, the suffix, the flow. Imports only types and config."""
