"""How good a ranking is: metrics, protocols, files of the servers, comparisons."""
