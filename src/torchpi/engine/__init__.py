"""The fast path beside the plain model: the same weights, computed with fewer passes over memory and fewer launches."""
