"""Token ids that other programs have stored, each format a module."""
