"""Speed, memory and accuracy of the update beside public peers, measured in one process and one run: ``make bench``."""
