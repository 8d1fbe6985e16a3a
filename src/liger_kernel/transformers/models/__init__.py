"""Model families as data: what their entry points are called and which flags they take."""
