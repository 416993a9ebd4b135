"""What tests of several rooms share: paths, stand-ins and tiny encoders."""
