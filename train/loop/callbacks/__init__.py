"""What happens beside the loop; each module holds one concern."""
