"""Cleaning text: what a document must be to be learned from, and which ones are there twice.

page.py: a step as a function of one document
unicode.py: normal forms
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
