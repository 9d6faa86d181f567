"""The named fast paths: machine code bound to a head; ``registry`` says which heads it serves."""
