"""Other libraries load a bundle unchanged: which, in which environments, and what their vectors are worth."""
