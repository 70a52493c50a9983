"""Cleaning text: what a document must be to be learned from, and which ones are there twice.

page.py: a step as a function of one document
unicode.py: normal forms, and damage that encodings did
html_text.py: the text of pages in HTML
text_features.py: lines and words of a text, for all the steps that look at it
line_rules.py: lines that go
quality.py: rules of quality for text
repetition.py: how much of a document repeats itself
code_rules.py: rules for source files
latex.py: papers
by_source.py: answers, books, articles, licences
languages.py: which language a document is in
word_lists.py: words and addresses that are not wanted
stages.py: work in stages, and steps that compare documents
models_for_cleaning.py: what steps ask of models
parts.py: the input in parts, pages as lines
tallies.py: counts that add up over parts
document_pass.py: documents through steps, one by one
cleaning_work.py: a job's folder: passes, tasks, what is done
local_pool.py: stages in processes of this machine
cluster.py: stages by datatrove: SLURM, Ray
clean_report.py: funnel, histograms, samples as a page and JSON
making.py: from a step's config to what it does
"""
