"""Measuring answers: accuracy by kind of question, tables and plots."""
