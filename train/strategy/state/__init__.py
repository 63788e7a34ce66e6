"""What engines write of themselves and take back."""
