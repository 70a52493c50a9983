"""Steps of `python -m maxlm.data clean`, and pipelines of them.

cleaning_job.py: a pipeline and its input
engines.py: what runs the tasks
cleaning_recipes.py: pipelines of papers
cleaning_pipeline.py: a pipeline, and the steps that there are
duplicate_steps.py: steps that remove what other documents hold already
rule_steps.py: steps that drop documents by what is measured of each
source_steps.py: steps for papers, answers, books, articles and source files
text_steps.py: steps that change documents
private_steps.py: personal data
score_steps.py: models that judge documents, and their training
decontamination_steps.py: text that is in evaluations, too
"""
