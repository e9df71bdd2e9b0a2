"""Tables, sentences, figures and pages, from the results of studies."""
