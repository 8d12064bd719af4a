# One word a chore; the work is in scripts/, so that a person, this file and CI run the same thing.
.DEFAULT_GOAL := help
.PHONY: help venv demo test test-release check docs

help:            ## this list
	@sed -n 's/^\([a-z-]*\): *## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 24

demo:            ## train, sample and measure a small model; ARGS="..." goes to it
	@scripts/demo $(ARGS)

test:            ## the tests, a few minutes; ARGS="..." goes to pytest
	@scripts/test $(ARGS)

test-release:    ## the heavy tests and the mutation tester
	@scripts/release $(ARGS)

check:           ## lint, types, documentation links
	@scripts/check

docs:            ## the documentation, served on this machine
	@scripts/docs $(ARGS)

venv:
	@scripts/venv
