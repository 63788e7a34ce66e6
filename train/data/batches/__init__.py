"""From stored tokens to the batches of each rank."""
