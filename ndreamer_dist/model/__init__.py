"""The model: network, codebooks, losses, and the sums over workers that make W workers compute the same as one."""
