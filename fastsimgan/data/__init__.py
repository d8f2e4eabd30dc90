"""Reading labelled synthetic and unlabelled real images, and the built-in simulators. Knows nothing of training."""
