"""The studies behind the README's figures: one file each over one runner. Not part of the installed package.

``python -m studies`` lists them. A study is a module with three functions: ``plan`` (which trials), ``run`` (what one
trial measures) and ``report`` (tables and figures from the result table).
"""
