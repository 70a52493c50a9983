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
sorted_files.py: records by which tasks hand on what others need
exact_duplicates.py: documents, paragraphs, lines, sentences that are there twice
minhash.py: signatures of documents
union_find.py: clusters of what is joined by pairs
near_duplicates.py: clusters of similar documents
substrings.py: stretches of text that are there twice
semantic.py: documents that mean the same
duplicate_verdicts.py: what becomes of copies
making.py: from a step's config to what it does
"""
