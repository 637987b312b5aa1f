"""The exercises of lesson 1."""
from course import Task

TASKS = {"entries": Task(9, wrong=[(6, "That is the causal half: here every token sees every token.")], hint="Count.")}
