//! The live view: who reaches whom, while the watcher takes pods away and brings them back.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use affinity_tests::daemon::binary;
use affinity_tests::view::SessionRow;
use anyhow::Result;
use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use ratatui::layout::{Constraint, Layout};
use ratatui::style::{Style, Stylize as _};
use ratatui::text::Line;
use ratatui::widgets::{Block, Cell, Gauge, Paragraph, Row, Table};

use crate::stage::{Door, Service, Stage, Way};

/// How often each client asks each service.
const PACE: Duration = Duration::from_millis(150);
/// How many lines of what happened are kept.
const NEWS: usize = 8;

/// What is shown.
#[derive(Default)]
struct View {
    /// Per service, client (and, of the sticky one, somebody outside) and pod: requests.
    reached: [Vec<BTreeMap<String, u64>>; 2],
    /// Per service and client: the last pod.
    last: [Vec<Option<String>>; 2],
    sessions: Vec<SessionRow>,
    news: VecDeque<String>,
    asking: bool,
    /// How often they have asked so far.
    asked: usize,
    daemon: u32,
    /// Where `affinity` is.
    binary: String,
}

const SERVICES: [Service; 2] = [Service::Sticky, Service::Spread];

/// Runs until the watcher leaves.
pub fn run(stage: &mut Stage) -> Result<()> {
    let clients = stage.clients().len();
    let mut view = View {
        reached: [vec![BTreeMap::new(); clients + 1], vec![BTreeMap::new(); clients]],
        last: [vec![None; clients + 1], vec![None; clients]],
        asking: true,
        daemon: stage.daemon_pid().unwrap_or_default(),
        binary: binary()?.display().to_string(),
        ..View::default()
    };
    view.tell("press 1 to 5 to take a pod away, and again to bring it back".into());
    let mut terminal = ratatui::init();
    let outcome = watch(stage, &mut view, &mut terminal);
    ratatui::restore();
    outcome
}

impl View {
    fn tell(&mut self, news: String) {
        self.news.push_front(news);
        self.news.truncate(NEWS);
    }

    fn ask(&mut self, stage: &Stage) {
        for (index, service) in SERVICES.into_iter().enumerate() {
            for client in 0..stage.clients().len() {
                self.note(stage, index, client, stage.ask(client, service, Way::Sockets));
            }
        }
        self.asked += 1;
        let door = Door::ALL[self.asked % Door::ALL.len()];
        let answer = stage.ask_from_outside(stage.outsiders()[0], door);
        self.note(stage, 0, stage.clients().len(), answer.map(|(pod, _)| pod));
    }

    fn note(&mut self, stage: &Stage, service: usize, client: usize, answer: Result<String>) {
        let pod = match answer {
            Ok(pod) => pod,
            Err(error) => return self.tell(format!("{error:#}")),
        };
        *self.reached[service][client].entry(pod.clone()).or_default() += 1;
        let before = self.last[service][client].replace(pod.clone());
        if let Some(before) = before
            && SERVICES[service] == Service::Sticky
            && stage.affinity().is_some()
            && before != pod
        {
            self.tell(format!("{} moved from {before} to {pod}", names(stage, SERVICES[service])[client]));
        }
    }
}

/// Who asks a service.
fn names(stage: &Stage, service: Service) -> Vec<String> {
    let mut names = stage.clients();
    if service == Service::Sticky {
        names.push("outside".to_owned());
    }
    names
}

fn watch(stage: &mut Stage, view: &mut View, terminal: &mut DefaultTerminal) -> Result<()> {
    let mut next = Instant::now();
    loop {
        if Instant::now() >= next {
            if view.asking {
                view.ask(stage);
            }
            view.sessions = stage.sessions()?;
            next = Instant::now() + PACE;
        }
        terminal.draw(|frame| draw(frame, stage, view))?;
        if !event::poll(next.saturating_duration_since(Instant::now()))? {
            continue;
        }
        let Event::Key(key) = event::read()? else { continue };
        if key.kind != KeyEventKind::Press {
            continue;
        }
        match key.code {
            KeyCode::Char('q') | KeyCode::Esc => return Ok(()),
            KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => return Ok(()),
            KeyCode::Char('n') => {
                let sticky = stage.affinity().is_none();
                stage.set_sticky(sticky)?;
                view.tell(format!("sessionAffinity: {}", if sticky { "ClientIP" } else { "None" }));
            }
            KeyCode::Char(' ') => {
                view.asking = !view.asking;
                view.tell(if view.asking { "the clients ask again" } else { "the clients are silent" }.into());
            }
            KeyCode::Char(digit @ '1'..='9') => toggle(stage, view, digit as usize - '1' as usize)?,
            _ => {}
        }
    }
}

fn toggle(stage: &mut Stage, view: &mut View, pod: usize) -> Result<()> {
    let Some((name, ready)) = stage.pods().get(pod).cloned() else { return Ok(()) };
    if ready {
        stage.take_away(&name)?;
        view.tell(format!("{name} went away"));
    } else {
        stage.bring_back(&name)?;
        view.tell(format!("{name} came back"));
    }
    Ok(())
}

fn draw(frame: &mut ratatui::Frame<'_>, stage: &Stage, view: &View) {
    let clients = stage.clients();
    #[expect(clippy::cast_possible_truncation, reason = "a handful of clients")]
    let rows = clients.len() as u16;
    let [title, sticky, spread, sessions, news, help] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Length(rows + 5),
        Constraint::Length(rows + 4),
        Constraint::Length(rows + 2),
        Constraint::Min(3),
        Constraint::Length(2),
    ])
    .areas(frame.area());
    frame.render_widget(Line::from(" Affinity: who reaches whom").bold(), title);
    for (index, (service, area)) in SERVICES.into_iter().zip([sticky, spread]).enumerate() {
        let affinity = match (service, stage.affinity()) {
            (Service::Sticky, Some(seconds)) => format!("ClientIP, {seconds} s"),
            _ => String::from("None"),
        };
        let block = Block::bordered().title(format!(" {}: sessionAffinity {affinity} ", service.name()));
        frame.render_widget(
            matrix(stage, names(stage, service), &view.reached[index], &view.last[index]).block(block),
            area,
        );
    }
    draw_sessions(frame, stage, view, sessions);
    let lines: Vec<Line<'_>> = view.news.iter().map(|line| Line::from(format!(" {line}"))).collect();
    frame.render_widget(Paragraph::new(lines).block(Block::bordered().title(" what happened ")), news);
    let help_text = vec![
        Line::from(" 1-5 pod away/back   n ClientIP/None   space clients silent/asking   q quit").bold(),
        Line::from(format!(" look around: nsenter -t {} -n -m {} session list", view.daemon, view.binary)),
    ];
    frame.render_widget(Paragraph::new(help_text), help);
}

fn matrix(
    stage: &Stage,
    names: Vec<String>,
    reached: &[BTreeMap<String, u64>],
    last: &[Option<String>],
) -> Table<'static> {
    let pods = stage.pods();
    let header = std::iter::once(Cell::from("")).chain(pods.iter().map(|(name, ready)| {
        let cell = Cell::from(name.clone());
        if *ready { cell } else { cell.style(Style::new().red().crossed_out()) }
    }));
    let rows = names.into_iter().enumerate().map(|(client, name)| {
        let counts = pods.iter().map(|(pod, _)| {
            let count = reached[client].get(pod).copied().unwrap_or_default();
            let cell = Cell::from(if count == 0 { String::from(".") } else { count.to_string() });
            if last[client].as_ref() == Some(pod) { cell.style(Style::new().green().bold()) } else { cell }
        });
        Row::new(std::iter::once(Cell::from(name)).chain(counts).collect::<Vec<_>>())
    });
    let totals = pods
        .iter()
        .map(|(pod, _)| Cell::from(reached.iter().filter_map(|pods| pods.get(pod)).sum::<u64>().to_string()));
    let totals = Row::new(std::iter::once(Cell::from("per pod")).chain(totals).collect::<Vec<_>>()).dim();
    let widths = std::iter::repeat_n(Constraint::Length(10), pods.len() + 1);
    Table::new(rows.chain([totals]).collect::<Vec<_>>(), widths).header(Row::new(header.collect::<Vec<_>>()))
}

fn draw_sessions(frame: &mut ratatui::Frame<'_>, stage: &Stage, view: &View, area: ratatui::layout::Rect) {
    let block = Block::bordered().title(" affinity entries ");
    let inner = block.inner(area);
    frame.render_widget(block, area);
    let lines = Layout::vertical(std::iter::repeat_n(Constraint::Length(1), stage.clients().len())).split(inner);
    for (client, line) in (0..stage.clients().len()).zip(lines.iter()) {
        let ip = stage.client_ip(client);
        let Some(session) = view.sessions.iter().find(|session| session.client == ip) else { continue };
        let timeout = f64::from(stage.affinity().unwrap_or(1));
        let ratio = session.left_seconds.map_or(0.0, |left| (left / timeout).clamp(0.0, 1.0));
        let left = session.left_seconds.map_or_else(|| String::from("expired"), |left| format!("{left:.1} s left"));
        let label = format!("{ip} -> {}: {left}", session.pod.as_deref().unwrap_or("a pod that is gone"));
        let style = if session.is_live() { Style::new().green() } else { Style::new().dark_gray() };
        frame.render_widget(Gauge::default().ratio(ratio).label(label).gauge_style(style), *line);
    }
}
