"""Tasks of Gymnasium and of this project's plant with policies that were trained on them, small enough to keep here."""
