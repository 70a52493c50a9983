"""Cleaning text: what a document must be to be learned from, and which ones are there twice.

page.py: a step as a function of one document
unicode.py: normal forms
stages.py: work in stages, and steps that compare documents
making.py: from a step's config to what it does
"""
