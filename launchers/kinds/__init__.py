"""What starts ranks: a module for each kind of launcher, all behind one protocol."""
