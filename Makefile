# One word for each chore. The work is in scripts/, so that a person, this file and CI run the same commands.
.DEFAULT_GOAL := help
.PHONY: help venv demo test test-release check dist docs studio bench bench-clock

help:            ## this list
	@sed -n 's/^\([a-z-]*\): *## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 24

demo:            ## train, sample and measure a small model; ARGS="..." is passed to it
	@scripts/demo $(ARGS)

test:            ## the tests, a few minutes; ARGS="..." is passed to pytest
	@scripts/test $(ARGS)

test-release:    ## the heavy tests, line coverage and the mutation tester
	@scripts/release $(ARGS)

check:           ## lint, types, documentation build
	@scripts/check

dist:            ## the wheel and the source archive in dist/, installed and tried in an environment of their own
	@scripts/dist

docs:            ## serve the documentation on this machine
	@scripts/docs $(ARGS)

bench:           ## the package beside others, appended to benchmarks/RECORDS.md; ARGS="PART..." for some
	@scripts/bench $(ARGS)

bench-clock:     ## the same minutes of training for each package, 5 and 10, three seeds; hours, and resumable
	@scripts/bench clock $(ARGS)

studio:          ## copy the JavaScript libraries of `undiffuse studio` from npm; needs Node.js
	@scripts/studio

venv:            ## create .venv with everything that a developer needs
	@scripts/venv check
