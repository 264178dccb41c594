"""The operator through which a forward pass reaches a layer's linear of today."""
