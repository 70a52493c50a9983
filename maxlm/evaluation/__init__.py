"""How good a model is: held-out loss and the figures that follow from it."""
