-- The job that writes `video_features` and its log: profiles from PostgreSQL, and what happened in the last five minutes, hour and
-- day. Windows are [end - size, end); one is told of when the watermark passes its end, and its row counts from that end on.

SET 'pipeline.name' = 'lake.video_features';

-- A play is complete by the duration of its impression, which was at most an hour before it. By a window over rows, since that
-- delays no watermark, as a join would.
CREATE TEMPORARY VIEW plays AS
SELECT
  video_id, event_time, play_ms,
  MAX(duration_ms) OVER (
    PARTITION BY request_id, video_id ORDER BY event_time RANGE BETWEEN INTERVAL '1' HOUR PRECEDING AND CURRENT ROW
  ) AS duration_ms
FROM (
  SELECT request_id, video_id, event_time, duration_ms, CAST(NULL AS BIGINT) AS play_ms
  FROM impressions
  WHERE is_event AND request_id IS NOT NULL
  UNION ALL
  SELECT request_id, video_id, event_time, CAST(NULL AS BIGINT), `value`
  FROM actions
  WHERE is_event AND request_id IS NOT NULL
    AND action = 'play'
);

CREATE TEMPORARY VIEW counted AS
SELECT video_id, event_time, CAST(1 AS BIGINT) AS is_view, CAST(0 AS BIGINT) AS is_complete, CAST(0 AS BIGINT) AS is_like
FROM impressions
WHERE is_event
UNION ALL
SELECT video_id, event_time, CAST(0 AS BIGINT), CAST(1 AS BIGINT), CAST(0 AS BIGINT)
FROM plays
WHERE play_ms >= 0.95E0 * duration_ms AND duration_ms > 0
UNION ALL
SELECT video_id, event_time, CAST(0 AS BIGINT), CAST(0 AS BIGINT), CAST(1 AS BIGINT)
FROM actions
WHERE is_event AND action = 'like';

CREATE TEMPORARY VIEW counts_5m AS
SELECT
  video_id, UNIX_TIMESTAMP(DATE_FORMAT(window_end, 'yyyy-MM-dd HH:mm:ss')) * 1000 AS end_ms,
  SUM(is_view) AS num_views, SUM(is_complete) AS num_completes, SUM(is_like) AS num_likes
FROM TABLE(HOP(TABLE counted, DESCRIPTOR(event_time), INTERVAL '1' MINUTE, INTERVAL '5' MINUTE))
GROUP BY video_id, window_start, window_end;

CREATE TEMPORARY VIEW counts_1h AS
SELECT
  video_id, UNIX_TIMESTAMP(DATE_FORMAT(window_end, 'yyyy-MM-dd HH:mm:ss')) * 1000 AS end_ms,
  SUM(is_view) AS num_views, SUM(is_complete) AS num_completes, SUM(is_like) AS num_likes
FROM TABLE(HOP(TABLE counted, DESCRIPTOR(event_time), INTERVAL '5' MINUTE, INTERVAL '1' HOUR))
GROUP BY video_id, window_start, window_end;

CREATE TEMPORARY VIEW counts_1d AS
SELECT
  video_id, UNIX_TIMESTAMP(DATE_FORMAT(window_end, 'yyyy-MM-dd HH:mm:ss')) * 1000 AS end_ms,
  SUM(is_view) AS num_views, SUM(is_complete) AS num_completes, SUM(is_like) AS num_likes
FROM TABLE(HOP(TABLE counted, DESCRIPTOR(event_time), INTERVAL '1' HOUR, INTERVAL '1' DAY))
GROUP BY video_id, window_start, window_end;

CREATE TEMPORARY VIEW video_changes AS
SELECT
  changed_ms AS event_time_ms, video_id, changed_ms AS profile_ms,
  CASE WHEN kind <> '-D' THEN author_id END AS author_id,
  CASE WHEN kind <> '-D' THEN sound_id END AS sound_id,
  CASE WHEN kind <> '-D' THEN tag_id END AS tag_id,
  CASE WHEN kind <> '-D' THEN duration_ms END AS duration_ms,
  CASE WHEN kind <> '-D' THEN quality END AS quality,
  CAST(NULL AS BIGINT) AS counts_5m_ms, CAST(NULL AS BIGINT) AS views_5m, CAST(NULL AS BIGINT) AS completes_5m,
  CAST(NULL AS BIGINT) AS likes_5m,
  CAST(NULL AS BIGINT) AS counts_1h_ms, CAST(NULL AS BIGINT) AS views_1h, CAST(NULL AS BIGINT) AS completes_1h,
  CAST(NULL AS BIGINT) AS likes_1h,
  CAST(NULL AS BIGINT) AS counts_1d_ms, CAST(NULL AS BIGINT) AS views_1d, CAST(NULL AS BIGINT) AS completes_1d,
  CAST(NULL AS BIGINT) AS likes_1d
FROM video_profile_changes
UNION ALL
SELECT
  end_ms, video_id, CAST(NULL AS BIGINT), CAST(NULL AS BIGINT), CAST(NULL AS BIGINT), CAST(NULL AS ARRAY<BIGINT>),
  CAST(NULL AS BIGINT), CAST(NULL AS DOUBLE),
  end_ms, num_views, num_completes, num_likes,
  CAST(NULL AS BIGINT), CAST(NULL AS BIGINT), CAST(NULL AS BIGINT), CAST(NULL AS BIGINT),
  CAST(NULL AS BIGINT), CAST(NULL AS BIGINT), CAST(NULL AS BIGINT), CAST(NULL AS BIGINT)
FROM counts_5m
UNION ALL
SELECT
  end_ms, video_id, CAST(NULL AS BIGINT), CAST(NULL AS BIGINT), CAST(NULL AS BIGINT), CAST(NULL AS ARRAY<BIGINT>),
  CAST(NULL AS BIGINT), CAST(NULL AS DOUBLE),
  CAST(NULL AS BIGINT), CAST(NULL AS BIGINT), CAST(NULL AS BIGINT), CAST(NULL AS BIGINT),
  end_ms, num_views, num_completes, num_likes,
  CAST(NULL AS BIGINT), CAST(NULL AS BIGINT), CAST(NULL AS BIGINT), CAST(NULL AS BIGINT)
FROM counts_1h
UNION ALL
SELECT
  end_ms, video_id, CAST(NULL AS BIGINT), CAST(NULL AS BIGINT), CAST(NULL AS BIGINT), CAST(NULL AS ARRAY<BIGINT>),
  CAST(NULL AS BIGINT), CAST(NULL AS DOUBLE),
  CAST(NULL AS BIGINT), CAST(NULL AS BIGINT), CAST(NULL AS BIGINT), CAST(NULL AS BIGINT),
  CAST(NULL AS BIGINT), CAST(NULL AS BIGINT), CAST(NULL AS BIGINT), CAST(NULL AS BIGINT),
  end_ms, num_views, num_completes, num_likes
FROM counts_1d;

EXECUTE STATEMENT SET
BEGIN
INSERT INTO paimon.lake.video_features
SELECT
  video_id, profile_ms, author_id, sound_id, tag_id, duration_ms, quality,
  counts_5m_ms, views_5m, completes_5m, likes_5m,
  counts_1h_ms, views_1h, completes_1h, likes_1h,
  counts_1d_ms, views_1d, completes_1d, likes_1d
FROM video_changes;
INSERT INTO paimon.lake.video_features_log
SELECT
  event_time_ms, DATE_FORMAT(TO_TIMESTAMP_LTZ(event_time_ms, 3), 'yyyy-MM-dd'),
  video_id, profile_ms, author_id, sound_id, tag_id, duration_ms, quality,
  counts_5m_ms, views_5m, completes_5m, likes_5m,
  counts_1h_ms, views_1h, completes_1h, likes_1h,
  counts_1d_ms, views_1d, completes_1d, likes_1d
FROM video_changes;
END;
