//! The exposition as text: `OpenMetrics`, and the older format of Prometheus for those who do not ask for that.

/// What a scraper wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// `OpenMetrics` 1.0.
    OpenMetrics,
    /// Prometheus' text format 0.0.4.
    Prometheus,
}

impl Format {
    /// What a request accepts, by its header.
    pub fn accepted(header: &str) -> Self {
        if header.contains("application/openmetrics-text") { Self::OpenMetrics } else { Self::Prometheus }
    }

    /// The content type of an answer.
    pub const fn content_type(self) -> &'static str {
        match self {
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Self::Prometheus => "text/plain; version=0.0.4; charset=utf-8",
        }
    }

    /// `OpenMetrics` text in this format.
    pub fn of(self, open_metrics: &str) -> String {
        // A sample without labels is written with the braces of a family's, which is legal and nobody's habit.
        let open_metrics = open_metrics.replace("{} ", " ");
        match self {
            Self::OpenMetrics => open_metrics,
            Self::Prometheus => to_prometheus(&open_metrics),
        }
    }
}

/// There a counter is called by what its samples are, and there are no units and no end.
fn to_prometheus(open_metrics: &str) -> String {
    let mut text = String::with_capacity(open_metrics.len());
    let mut help = None;
    for line in open_metrics.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            help = rest.split_once(' ');
        } else if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' ')) {
            let total = if kind == "counter" { "_total" } else { "" };
            if let Some((_, meaning)) = help.take() {
                text.extend(["# HELP ", name, total, " ", meaning, "\n"]);
            }
            text.extend(["# TYPE ", name, total, " ", kind, "\n"]);
        } else if !line.starts_with('#') {
            text.extend([line, "\n"]);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_older_format_names_counters_by_their_samples() {
        let open = "# HELP a_bytes some help.\n# TYPE a_bytes counter\n# UNIT a_bytes bytes\na_bytes_total{b=\"c d\"} 1\n\
                    # HELP g other\n# TYPE g gauge\ng{} 1.5\n# EOF\n";
        let old = "# HELP a_bytes_total some help.\n# TYPE a_bytes_total counter\na_bytes_total{b=\"c d\"} 1\n\
                   # HELP g other\n# TYPE g gauge\ng 1.5\n";
        assert_eq!(Format::accepted("text/plain;q=0.5").of(open), old);
        let header = "application/openmetrics-text;version=1.0.0;q=0.8,text/plain;version=0.0.4;q=0.5,*/*;q=0.1";
        assert_eq!(Format::accepted(header).of(open), open.replace("{}", ""));
    }
}
