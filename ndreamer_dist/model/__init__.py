"""The model: network, codebooks, losses, and communication that makes W workers compute the same as one."""
