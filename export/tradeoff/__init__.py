"""Speed against quality: faster forms of an encoder, made, measured, and one of them chosen."""
