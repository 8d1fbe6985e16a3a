"""The layers: modules with the parameters and constructors of the HuggingFace classes whose place they take."""
