"""What a target says about the output: ``base`` has the form of a rule, ``registry`` the rules by name."""
