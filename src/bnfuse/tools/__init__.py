"""What is built on the library and is not the library: the command line, the demonstration, the zoos, the census.

Nothing outside of this folder imports from it.
"""
