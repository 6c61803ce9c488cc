"""Damaged inputs, drawn from seeds, for every reader of the project.

A case is a reader's name and a number: which file is damaged, and how, follows from the two.

python -m tests.fuzz                                    every reader, as many cases as the tests have
python -m tests.fuzz --readers "native" --cases 500     counts by verdict, and every case that failed
"""
