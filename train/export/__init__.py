"""From a trained or saved state to a model directory in whole weights, and its card."""
