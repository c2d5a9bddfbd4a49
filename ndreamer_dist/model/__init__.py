"""The model: network, codebooks, losses, and the sums over workers that make W workers compute what one would."""
