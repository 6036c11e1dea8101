"""Newton steps on a Gram matrix, which end exactly."""
