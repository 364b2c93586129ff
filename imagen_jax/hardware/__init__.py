"""What machines there are, how they are called, and what their compilers say of a program."""
